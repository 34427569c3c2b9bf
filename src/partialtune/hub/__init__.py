"""The Hugging Face Hub: access, upload, verification."""
