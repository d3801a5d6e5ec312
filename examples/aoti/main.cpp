// Draws one image with a student exported by `ddfast export --to aoti`.
//
//   draw model.pt2 CLASS OUT.ppm [SEED]
//
// The noise is torch's own of SEED. To get the images of `ddfast run`, export with --noise-in-graph: such a graph makes
// ddfast's noise, from the inputs label, seed and sample.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>

namespace {

// image: float32 [3, H, W] in [0, 1]
void write_ppm(const char* path, const at::Tensor& image) {
    const auto bytes = image.mul(255).round().to(at::kByte).permute({1, 2, 0}).contiguous();  // [H, W, 3]
    std::ofstream file(path, std::ios::binary);
    file << "P6\n" << image.size(2) << ' ' << image.size(1) << "\n255\n";
    file.write(static_cast<const char*>(bytes.const_data_ptr()), bytes.numel());
    if (!file.flush()) throw std::runtime_error(std::string("cannot write ") + path);
}

void draw(const char* model, int64_t label, const char* out, uint64_t seed) {
    torch::inductor::AOTIModelPackageLoader loader(model);
    const auto facts = loader.get_metadata();
    const auto size = [&](const char* name) { return std::stol(facts.at(std::string("ddfast.") + name)); };
    if (facts.at("ddfast.inputs") != "label,noise" || facts.at("ddfast.outputs") != "image,embeddings" ||
        size("least_batch") > 1) {
        throw std::runtime_error("the file does not make an image of a label and noise");
    }
    if (label < 0 || label >= size("num_classes")) throw std::runtime_error("no such class");

    const at::Device device(facts.at("AOTI_DEVICE_KEY"));  // cpu or cuda
    at::manual_seed(seed);
    const auto labels = at::full({1}, label, at::kLong);  // [B]
    const auto noise = at::randn({1, size("tokens"), size("channels")});  // [B, L, C]
    const auto outputs = loader.run({labels.to(device), noise.to(device)});  // image [B, 3, H, W], embeddings [B, L, C]
    write_ppm(out, outputs.at(0)[0].cpu());
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 4 || argc > 5) {
        std::cerr << "usage: " << argv[0] << " model.pt2 CLASS OUT.ppm [SEED]\n";
        return 2;
    }
    try {
        draw(argv[1], std::stol(argv[2]), argv[3], argc > 4 ? std::stoull(argv[4]) : 0);
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
}
