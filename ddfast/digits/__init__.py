"""The miniature that ships: scikit-learn's digits, their tokenizers, teachers and the classifier that measures them.

Training, and measuring a tokenizer, need scikit-learn for its data (``pip install 'ddfast[digits]'``); using the
bundled weights does not.
"""
