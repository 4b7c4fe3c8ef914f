"""tautomer.rewrite: the framework. Knows no paper, no model family, no runtime.

Reading order (a file imports only files above it):
"""
