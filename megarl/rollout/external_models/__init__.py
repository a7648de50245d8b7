"""Models that SGLang lacks; it imports every module here when SGLANG_EXTERNAL_MODEL_PACKAGE names this package."""
