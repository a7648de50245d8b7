"""Llama, Mistral, Phi-3, Qwen2 and Qwen3: a decoder alone."""
