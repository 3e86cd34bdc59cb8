"""The attacks of docs/PROMISES.md: quick in `make test`, at full length in `make torture`."""
