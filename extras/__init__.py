"""What users need beyond the method: forms of data, published tokenizers, metrics, pictures. See README.md."""
