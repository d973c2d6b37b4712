"""What the library costs, beside its peers; see README.md."""
