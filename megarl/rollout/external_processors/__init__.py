"""What SGLang does with the images of those models; SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE names this package."""
