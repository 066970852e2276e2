"""Data: the corpus of real text, packing with sample isolation, and procedural tasks with verifiers."""

from __future__ import annotations

from dsv4.data.corpus import build_corpus, heldout_texts
from dsv4.data.documents import Documents, encode_corpus, load_documents
from dsv4.data.packing import Packing

__all__ = ["Documents", "Packing", "build_corpus", "encode_corpus", "heldout_texts", "load_documents"]
