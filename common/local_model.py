"""What the embedding model inside the wordllama wheel is called, and how long its embeddings are.

Apart from the embedder, so that whoever only names the model need not load what runs it.
"""

# The model was trained so that its first 64 or 128 numbers are embeddings too.
LOCAL_DIMENSIONS = (64, 128, 256)
_LOCAL_MODEL = "wordllama-l2-supercat"


def local_model_name(dimensions: int) -> str:
    """What embeddings of the local model are called in a catalog."""
    return f"{_LOCAL_MODEL}-{dimensions}"
