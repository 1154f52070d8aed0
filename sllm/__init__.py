"""Control plane and simulator for serverless LLM serving."""

__version__ = "0.1.0"
