// Train the digits network in C++: no Python, libpyopt for the step, a pool of threads of the program's own.
//
//     python tools/build_c_library --output lib                    # once
//     python examples/embedding_cpp/export_digits.py digits.bin    # the data, from scikit-learn
//     g++ -std=c++17 -O3 -Ilib examples/embedding_cpp/train_digits.cpp lib/libpyopt.a -fopenmp -o train
//     ./train digits.bin --threads 4 --epochs 10
//
// or with CMake: see CMakeLists.txt. The digest at the end is the same for every number of threads.

#include <pyopt.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

// Threads that wait until there is work: `run` calls work(i) for all i below n, on all of them and on its own.
class Pool {
public:
    explicit Pool(int threads) {
        for (int i = 1; i < threads; i++) workers_.emplace_back([this] { serve(); });
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stops_ = true;
        }
        begin_.notify_all();
        for (auto &worker : workers_) worker.join();
    }
    void run(std::int64_t n, const std::function<void(std::int64_t)> &work) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            work_ = &work, n_ = n, next_ = 0, busy_ = workers_.size(), round_++;
        }
        begin_.notify_all();
        take(work, n);
        std::unique_lock<std::mutex> lock(mutex_);
        end_.wait(lock, [this] { return busy_ == 0; });
    }

private:
    void take(const std::function<void(std::int64_t)> &work, std::int64_t n) {
        for (std::int64_t i; (i = next_++) < n;) work(i);
    }
    void serve() {
        for (std::uint64_t seen = 0;;) {
            std::unique_lock<std::mutex> lock(mutex_);
            begin_.wait(lock, [&] { return stops_ || round_ != seen; });
            if (stops_) return;
            seen = round_;
            const auto *work = work_;
            const auto n = n_;
            lock.unlock();
            take(*work, n);
            lock.lock();
            if (--busy_ == 0) end_.notify_one();
        }
    }
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable begin_, end_;
    const std::function<void(std::int64_t)> *work_ = nullptr;
    std::int64_t n_ = 0;
    std::atomic<std::int64_t> next_{0};
    std::size_t busy_ = 0;
    std::uint64_t round_ = 0;
    bool stops_ = false;
};

// Adam over the parameters that were added: it owns states, options and the plan; chunks of a step run in the pool.
class Adam {
public:
    Adam(Pool &pool, double lr) : pool_(pool), rule_(api_->find_rule("Adam")), options_(PYOPT_MOST_OPTIONS) {
        api_->fill_defaults(rule_, options_.data());
        set("lr", lr);
    }
    ~Adam() { api_->destroy(plan_); }
    Adam(const Adam &) = delete;
    Adam &operator=(const Adam &) = delete;

    void add(std::vector<float> &parameter, std::vector<float> &gradient) {
        pyopt_row row = PYOPT_ROW;
        row.rule = rule_;
        row.n = static_cast<std::int64_t>(parameter.size());
        row.parameter.data = parameter.data();
        row.gradient.data = gradient.data();
        for (int j = 0; j < 2; j++) {
            states_.emplace_back(parameter.size());
            row.state[j].data = states_.back().data();
        }
        rows_.push_back(row);
    }
    void set(const char *name, double value) { options_[api_->find_option(rule_, name)] = value; }
    void step() {
        if (plan_ == nullptr) check(api_->create(rows_.data(), rows_.size(), 0, &plan_, message_, sizeof message_));
        slot_.options = options_.data();
        check(api_->prepare(plan_, &slot_, 1, message_, sizeof message_));
        pool_.run(api_->chunks(plan_), [this](std::int64_t i) { api_->run(plan_, i, i + 1); });
        slot_.step++;
    }

private:
    void check(int status) const {
        if (status != PYOPT_OK) throw std::runtime_error(message_);
    }
    const pyopt_functions *api_ = pyopt_api();
    Pool &pool_;
    int rule_;
    std::vector<double> options_;
    std::vector<pyopt_row> rows_;
    std::vector<std::vector<float>> states_;
    pyopt_slot slot_ = PYOPT_SLOT;
    pyopt_plan *plan_ = nullptr;
    char message_[256] = "";
};

constexpr int PIXELS = 64, HIDDEN = 256, DIGITS = 10, BATCH = 32;

struct Digits {
    std::vector<float> x;
    std::vector<std::int32_t> y;
};

// Images and labels to train on and to test with: the counts of both, then for each the images and the labels.
std::pair<Digits, Digits> load(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    std::int32_t counts[2];
    std::pair<Digits, Digits> found;
    file.read(reinterpret_cast<char *>(counts), sizeof counts);
    for (Digits *part : {&found.first, &found.second}) {
        if (!file || counts[0] < 0 || counts[1] < 0 || counts[0] > 100000 || counts[1] > 100000)
            throw std::runtime_error(path + " is not what export_digits.py writes");
        const std::int32_t n = part == &found.first ? counts[0] : counts[1];
        part->x.resize(static_cast<std::size_t>(n) * PIXELS);
        part->y.resize(n);
        file.read(reinterpret_cast<char *>(part->x.data()), static_cast<std::streamsize>(part->x.size() * sizeof(float)));
        file.read(reinterpret_cast<char *>(part->y.data()), static_cast<std::streamsize>(n * sizeof(std::int32_t)));
    }
    if (!file) throw std::runtime_error(path + " is too short");
    return found;
}

// 64 pixels, a hidden layer with ReLU, 10 logits.
struct Network {
    std::vector<float> w1, b1, w2, b2, dw1, db1, dw2, db2, h, logits;

    explicit Network(std::mt19937 &random)
        : w1(PIXELS * HIDDEN), b1(HIDDEN), w2(HIDDEN * DIGITS), b2(DIGITS), dw1(w1.size()), db1(b1.size()),
          dw2(w2.size()), db2(b2.size()), h(HIDDEN), logits(DIGITS) {
        std::normal_distribution<float> normal;
        for (auto &w : w1) w = normal(random) * std::sqrt(2.0f / PIXELS);
        for (auto &w : w2) w = normal(random) * std::sqrt(2.0f / HIDDEN);
    }
    int forward(const float *x) {
        std::copy(b1.begin(), b1.end(), h.begin());
        for (int i = 0; i < PIXELS; i++)
            for (int j = 0; j < HIDDEN; j++) h[j] += x[i] * w1[i * HIDDEN + j];
        for (auto &value : h) value = std::max(value, 0.0f);
        std::copy(b2.begin(), b2.end(), logits.begin());
        for (int j = 0; j < HIDDEN; j++)
            for (int k = 0; k < DIGITS; k++) logits[k] += h[j] * w2[j * DIGITS + k];
        return static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    }
    // The loss of one image; adds its share of the gradient of a batch.
    float backward(const float *x, int label) {
        const float most = *std::max_element(logits.begin(), logits.end());
        float sum = 0, p[DIGITS];
        for (int k = 0; k < DIGITS; k++) sum += p[k] = std::exp(logits[k] - most);
        const float loss = std::log(sum) + most - logits[label];
        for (int k = 0; k < DIGITS; k++) p[k] = (p[k] / sum - (k == label)) / BATCH;
        for (int k = 0; k < DIGITS; k++) db2[k] += p[k];
        for (int j = 0; j < HIDDEN; j++) {
            if (h[j] <= 0) continue;
            float dh = 0;
            for (int k = 0; k < DIGITS; k++) {
                dw2[j * DIGITS + k] += h[j] * p[k];
                dh += w2[j * DIGITS + k] * p[k];
            }
            db1[j] += dh;
            for (int i = 0; i < PIXELS; i++) dw1[i * HIDDEN + j] += x[i] * dh;
        }
        return loss;
    }
    void clear() {
        for (auto *d : {&dw1, &db1, &dw2, &db2}) std::fill(d->begin(), d->end(), 0.0f);
    }
};

std::uint64_t digest(const std::vector<float> &values, std::uint64_t h) {
    const auto *bytes = reinterpret_cast<const unsigned char *>(values.data());
    for (std::size_t i = 0; i < values.size() * sizeof(float); i++) h = (h ^ bytes[i]) * 1099511628211u;
    return h;
}

int main(int argc, char **argv) try {
    int threads = 2, epochs = 10;
    std::string path;
    for (int i = 1; i < argc; i++) {
        const std::string word = argv[i];
        if (word == "--threads" && i + 1 < argc) threads = std::max(1, std::atoi(argv[++i]));
        else if (word == "--epochs" && i + 1 < argc) epochs = std::atoi(argv[++i]);
        else path = word;
    }
    if (path.empty()) throw std::runtime_error("usage: train digits.bin [--threads N] [--epochs N]");
    const auto [train, test] = load(path);
    std::mt19937 random(0);
    Network network(random);
    Pool pool(threads);
    Adam adam(pool, 2e-3);
    adam.add(network.w1, network.dw1);
    adam.add(network.b1, network.db1);
    adam.add(network.w2, network.dw2);
    adam.add(network.b2, network.db2);

    std::vector<int> order(train.y.size());
    std::iota(order.begin(), order.end(), 0);
    for (int epoch = 1; epoch <= epochs; epoch++) {
        std::shuffle(order.begin(), order.end(), random);
        double loss = 0;
        const std::size_t steps = order.size() / BATCH;
        for (std::size_t b = 0; b < steps; b++) {
            network.clear();
            for (int i = 0; i < BATCH; i++) {
                const int image = order[b * BATCH + i];
                network.forward(&train.x[image * PIXELS]);
                loss += network.backward(&train.x[image * PIXELS], train.y[image]);
            }
            adam.step();
        }
        int right = 0;
        for (std::size_t i = 0; i < test.y.size(); i++) right += network.forward(&test.x[i * PIXELS]) == test.y[i];
        std::printf("epoch %2d: loss %.4f, test accuracy %.1f %%\n", epoch, loss / double(steps * BATCH),
                    100.0 * right / double(test.y.size()));
    }
    std::uint64_t h = 14695981039346656037u;
    for (const auto *values : {&network.w1, &network.b1, &network.w2, &network.b2}) h = digest(*values, h);
    std::printf("digest %016llx\n", static_cast<unsigned long long>(h));
} catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
