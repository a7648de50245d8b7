"""Models that SGLang lacks or computes otherwise; it imports every module here when SGLANG_EXTERNAL_MODEL_PACKAGE names
this package."""
