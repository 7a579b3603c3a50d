"""What the library says: wrong arguments, missing extras, sentences, progress."""
