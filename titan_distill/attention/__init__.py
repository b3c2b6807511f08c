"""Attention cores: what happens between the q/k/v projections and the output projection, one choice per role."""
