"""The attacks behind docs/PROMISES.md: short in `make test`, in full in `make torture`."""
