"""Stage 3, plan: a `Program` in, a `Plan` out, which says how every latent and every parameter is treated, and why."""
