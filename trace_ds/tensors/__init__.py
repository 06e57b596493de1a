"""The tensors of a model on disk: where they lie, how they are named and cut, and moving their bytes.

Read in this order: model_files (a model directory by its headers), torch_archive (files without unpickling), runs
(tensors as byte ranges), checkpoint (an opened source), deepspeed_source (reading one of DeepSpeed's), layouts (names
and cuts), stream (moving bytes), opening (which kind of source it is).
"""
