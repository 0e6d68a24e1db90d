"""Readers of images with labels in columns: tables with images, and tar files; and the options that they share."""
