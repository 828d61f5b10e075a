"""How good a generator's digits are: the two judges, and the figures that they give. Knows no training of a GAN."""
