"""LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, and the like of other towers and decoders."""
