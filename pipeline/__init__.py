"""Who asks and when it runs: recipe, plan, run, command line. Nothing is imported here; torch is never imported at
import.
"""
