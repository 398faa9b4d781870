"""What a trained adapter becomes: a merged model, an adapter of another program, and the proof that it works there."""
