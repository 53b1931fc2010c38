"""Where normal ends: block scores of held-out normal sessions and their conformal quantile."""
