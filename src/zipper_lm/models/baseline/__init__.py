"""What Zipper is compared with."""
