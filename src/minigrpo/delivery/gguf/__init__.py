"""Export a merged model as GGUF files, quantize them, and compare them with the model. May import what delivery may,
with artifacts and parity of delivery itself.
"""
