"""What a deployment would cost: measured on this machine, then projected.

figures.py marks every number, shapes.py and peers.py hold what is public, synthetic.py writes what
measuring.py times, projection.py computes, svg.py and page.py draw, run.py puts it together.
"""
