"""Program to Program, one decision a file."""
