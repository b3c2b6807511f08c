"""Training data: conversion of footage to parquet files of latents and text embeddings, and loading of batches for any
number of ranks."""
