"""Llama, Mistral, Qwen2 and Qwen3: a decoder alone."""
