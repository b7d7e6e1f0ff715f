"""What all studies of a decoder share: the model, its adapter, its optimizer and its training step on a mesh."""
