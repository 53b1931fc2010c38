"""What normal looks like: vocabulary, denoising transformer autoencoder, training, scoring, bundle on disk."""
