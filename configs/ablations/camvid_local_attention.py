"""camvid_outlook.py with local self-attention, window 3 x 3, in the place of outlook attention."""

_base_ = './camvid_outlook.py'
model = dict(backbone=dict(mixer='local_attention'))
