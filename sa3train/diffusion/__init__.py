"""The mathematics of diffusion as pure functions: schedules, samplers, guidance, masks, training objective."""
