"""What is computed: labelled blocks in, labelled blocks out.

Nothing is imported here, so that a plan can be made without torch.
"""
