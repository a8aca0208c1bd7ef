"""Export a merged model in the compressed-tensors formats that vLLM reads, and compare every weight with the model's.
May import what delivery may, with artifacts, gguf and parity of delivery itself.
"""
