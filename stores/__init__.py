"""Where it is kept: labelled data at rest. Knows no model and never imports torch.

Nothing is imported here, so that reading a ledger costs no more than the standard library.
"""
