"""The diffusion core: the noise schedule, keyed random draws and the samplers. It knows no model and no method."""
