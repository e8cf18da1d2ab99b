"""Colour: sRGB <-> CIE Lab, the 313 bins of the ab plane, and the class weights that follow from how often each occurs."""
