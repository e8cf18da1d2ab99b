"""Colour: sRGB <-> CIE Lab, the 313 bins of the ab plane, and class weights from how often each occurs."""
