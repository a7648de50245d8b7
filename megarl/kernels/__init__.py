"""The operations worth fusing, each beside its plain torch form."""
