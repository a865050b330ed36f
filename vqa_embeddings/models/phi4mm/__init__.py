"""The family of Phi-4-multimodal."""
