"""Training: the step of both networks, its losses, the loop around it, one process or several. Knows no command line."""
