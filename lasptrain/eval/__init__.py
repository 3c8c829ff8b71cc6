"""What a trained model is asked: to continue a text, and for its loss on text it has not seen."""
