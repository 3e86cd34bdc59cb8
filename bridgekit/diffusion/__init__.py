"""Image generation from the shared space: conditioning of pipelines, the map into it, and drawing."""
