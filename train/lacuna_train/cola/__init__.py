"""Cola DLM (arXiv 2605.06548): a text VAE and a block-causal diffusion Transformer over its latents."""
