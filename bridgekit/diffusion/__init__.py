"""From the shared space to pictures: what a pipeline takes, the map into it, and generation."""
