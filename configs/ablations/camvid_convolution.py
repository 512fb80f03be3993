"""camvid_outlook.py with a 3 x 3 convolution in the place of outlook attention."""

_base_ = './camvid_outlook.py'
model = dict(backbone=dict(mixer='convolution'))
