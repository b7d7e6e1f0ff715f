"""The files of pretrained models, whichever format holds them."""
