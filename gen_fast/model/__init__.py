"""The frozen decoder: weights, tokens, one forward pass, and the text it writes."""
