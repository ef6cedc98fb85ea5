"""What users need beyond the method: forms of data, metrics, pictures, pages. See extras/README.md."""
