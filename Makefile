# SPDX-License-Identifier: MIT
#
# The product is two headers, so nothing has to be built to use them: this file builds the examples, runs the tests and installs.
# `make` alone lists the targets. What may be set, on the command line or in the environment:
#   CC CPPFLAGS CFLAGS LDFLAGS   the compiler and its options, placed after the project's own
#   WERROR=-Werror               turns the warnings into errors
#   BUILD                        where everything built goes
#   ROUNDS                       how often `bench` and `bench-iommu` measure everything
#   MINUTES                      how long `fuzz` takes
#   MACHINES                     what `check-portable` runs; nothing: lto musl valgrind i386 s390x arm64 armhf
#   VFU_PORTABLE_TESTS           only these tests there
#   PREFIX DESTDIR               where `install` puts the headers
#   BENCH_NVME                   arguments of tests/qemu/bench_nvme.sh

BUILD   ?= build
PREFIX  ?= /usr/local
CFLAGS  ?= -O2 -g
CLANG   ?= clang

WARN    := -Wall -Wextra -Wpedantic -Wshadow -Wconversion
SANITIZE_ADDRESS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
SANITIZE_THREAD  := -fsanitize=thread -fno-omit-frame-pointer

# glibc before 2.34 keeps its threads in a library of their own: always -pthread.
COMPILE = -std=c11 $(WARN) $(WERROR) -I. -pthread $(1) $(CPPFLAGS) $(CFLAGS) -MMD -MP -MF $@.d -MT $@

EXAMPLES := $(patsubst examples/%.c,%,$(wildcard examples/*.c))
TESTS    := $(patsubst tests/%.c,%,$(wildcard tests/test_*.c))
# Tests with threads: those that start some, those that include what does, which their name tells, and that of a device with some;
# but test_faults takes turns with its device by eventfds, which ThreadSanitizer can't follow from a descriptor to its duplicate.
THREADED := $(filter-out test_faults,$(sort $(filter %threads test_nvme,$(TESTS)) \
    $(patsubst tests/%.c,%,$(shell grep -l pthread_create $(wildcard tests/test_*.c) /dev/null))))

# A C file that defines this macro brings the implementation itself; any other test is linked with tests/impl.c.
HASH := \#
BRINGS_IMPLEMENTATION := $(shell grep -lE '^ *$(HASH) *define +VFU_(IOMMU_)?IMPLEMENTATION' \
    $(wildcard tests/test_*.c tests/bench/*.c) /dev/null)

# Evaluated when the first recipe needs it, since `make deps check` installs these tools on the way, and then kept.
once = $(eval $(1) := $(shell $(2)))$($(1))
CHECK_CFLAGS = $(call once,CHECK_CFLAGS,pkg-config --cflags check 2>/dev/null)
CHECK_LIBS   = $(call once,CHECK_LIBS,pkg-config --libs check 2>/dev/null || echo -lcheck)

# The sanitizer builds use CC, or clang where CC has no sanitizers (gcc on musl).
SAN_CC = $(call once,SAN_CC,for cc in '$(CC)' '$(CLANG)'; do \
    echo 'int main(void) { return 0; }' | $$cc -fsanitize=address -x c -o $(BUILD)/probe - 2>/dev/null && echo "$$cc" && exit; \
    done; echo '$(CC)')

# Targets wait for the installation in `make -j deps check`.
AFTER_DEPS := $(filter deps,$(MAKECMDGOALS))
# Targets that `help` leaves out because what they run isn't there.
ABSENT := $(if $(wildcard tests/firmware.sh),,check-firmware)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*## .*/\1/p' Makefile) FORCE

help: ## list the targets
	@awk -v absent=' $(ABSENT) ' '/^[a-z-]+:.*## / { name = $$1; sub(/:.*/, "", name); sub(/^.*## /, "");            \
	    if (!index(absent, " " name " ")) printf "  make %-16s%s\n", name, $$0 }' Makefile

examples: $(EXAMPLES:%=$(BUILD)/examples/%) ## build every program of examples/

demo: $(BUILD)/examples/dma_engine $(BUILD)/examples/dma_client ## run the example client against the example device
	@sh tests/demo.sh $(BUILD)/examples

deps: ## install what the tests need, with the system's package manager
	@sh tests/deps.sh

check: check-normal check-asan check-compile ## run the tests: normal build, sanitizers, compilers

# Whatever was compiled with other options is compiled again. Two makes may be at this at once.
$(BUILD)/config: FORCE | $(AFTER_DEPS)
	@mkdir -p $(@D)
	@new=$@.$$$$; printf '%s\n' '$(subst ','\'',$(CC) $(CLANG) $(WERROR) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS))' >$$new;          \
	    if cmp -s $$new $@; then rm $$new; else mv $$new $@; fi

# One build of the examples and the tests: $(call build,DIRECTORY,COMPILER,FLAGS). $$ leaves a variable to the recipes: SAN_CC is
# known late, and the flags have commas.
define build
$(EXAMPLES:%=$(1)/examples/%): $(1)/examples/%: examples/%.c $(BUILD)/config
	@mkdir -p $$(@D)
	$(2) $$(call COMPILE,$(3)) $$(LDFLAGS) -o $$@ $$<

$(TESTS:%=$(1)/tests/%.o) $(1)/tests/impl.o: $(1)/tests/%.o: tests/%.c $(BUILD)/config
	@mkdir -p $$(@D)
	$(2) $$(call COMPILE,$(3)) $$(CHECK_CFLAGS) -c -o $$@ $$<

$(patsubst %,$(1)/tests/%,$(filter-out $(BRINGS_IMPLEMENTATION:tests/%.c=%),$(TESTS))): $(1)/tests/impl.o
$(TESTS:%=$(1)/tests/%): %: %.o
	$(2) -pthread $(3) $$(LDFLAGS) -o $$@ $$^ $$(CHECK_LIBS)
endef

# The instrumentation takes compilers twice as long with -O2.
ifeq ($(origin CFLAGS),file)
$(BUILD)/asan/% $(BUILD)/tsan/%: CFLAGS = -O1 -g
endif

$(eval $(call build,$(BUILD),$$(CC),))
$(eval $(call build,$(BUILD)/asan,$$(SAN_CC),$$(SANITIZE_ADDRESS)))
$(eval $(call build,$(BUILD)/clang,$$(CLANG),))
$(eval $(call build,$(BUILD)/tsan,$$(SAN_CC),$$(SANITIZE_THREAD)))

NORMAL_PROGRAMS := $(EXAMPLES:%=$(BUILD)/examples/%)       $(TESTS:%=$(BUILD)/tests/%)
ASAN_PROGRAMS   := $(EXAMPLES:%=$(BUILD)/asan/examples/%)  $(TESTS:%=$(BUILD)/asan/tests/%)
CLANG_PROGRAMS  := $(EXAMPLES:%=$(BUILD)/clang/examples/%) $(TESTS:%=$(BUILD)/clang/tests/%)
TSAN_PROGRAMS   := $(EXAMPLES:%=$(BUILD)/tsan/examples/%)  $(THREADED:%=$(BUILD)/tsan/tests/%)

tests: $(NORMAL_PROGRAMS) $(ASAN_PROGRAMS) $(CLANG_PROGRAMS) $(TSAN_PROGRAMS) ## build the test programs without running them

check-normal: $(NORMAL_PROGRAMS) ## run the tests as CC builds them
	@sh tests/run.sh $(BUILD) $(TESTS) demo.sh

check-asan: $(ASAN_PROGRAMS) ## run the tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@sh tests/run.sh $(BUILD)/asan $(TESTS) demo.sh

check-clang: $(CLANG_PROGRAMS) ## run the tests as clang builds them
	@sh tests/run.sh $(BUILD)/clang $(TESTS) demo.sh

check-tsan: $(TSAN_PROGRAMS) ## run the tests with threads under ThreadSanitizer
	@sh tests/run.sh $(BUILD)/tsan $(THREADED)

check-stress: | $(AFTER_DEPS) ## unmap under fire, a million times, beside a control that must fail
	@CC='$(CC)' tests/stress_iommu.sh $(BUILD)

# Sieges are shortened in `check`.
check-hostile: $(NORMAL_PROGRAMS) $(ASAN_PROGRAMS) ## hostile peers in full: floods, 10,000 aborts, 1,000 times kill -9 of each side
	@VFU_SIEGE=1 sh tests/run.sh $(BUILD) test_hostile test_mistakes test_siege
	@VFU_SIEGE=1 sh tests/run.sh $(BUILD)/asan test_hostile test_mistakes test_siege

# Status 77 says that the compilers can't be had here.
check-portable: | $(AFTER_DEPS) ## run the tests on other machines, with -O3 -flto, with musl and under valgrind
	@tests/portable.sh '$(BUILD)' $(MACHINES) || test $$? -eq 77

# Without optimisation, so that branches are those of the source; assertions, which no peer can reach, are compiled away. What the
# threads' timing has left out gets a second run, whose counts are added.
coverage: | $(AFTER_DEPS) ## how much of the headers the tests execute; fails when that is too little
	@rm -rf '$(BUILD)/coverage'
	@for run in 1 2; do                                                                                                      \
	    $(MAKE) --no-print-directory BUILD='$(BUILD)/coverage' LDFLAGS=--coverage                                            \
	        CFLAGS='-O0 -g --coverage -fprofile-update=atomic -D"VFU_ASSERT(condition)=((void)0)"' check-normal || exit;     \
	    sh tests/coverage.sh '$(BUILD)/coverage' && exit;                                                                    \
	done; exit 1

MINUTES ?= 5
fuzz: | $(AFTER_DEPS) ## fuzz both endpoints, the JSON parser and the vIOMMU for MINUTES in all (5), with libFuzzer
	@CLANG='$(CLANG)' CPPFLAGS='$(CPPFLAGS)' tests/fuzz/run.sh '$(BUILD)' '$(MINUTES)' || test $$? -eq 77

# Status 77 says that CBMC can't be had here.
prove: | $(AFTER_DEPS) ## prove codec, JSON, PCI and framing for all inputs up to a bound, with CBMC 6
	@tests/proof/run.sh '$(BUILD)' || test $$? -eq 77

# Status 77 says that something the test needs can't be had here, which the script has explained: no failure.
check-qemu: examples | $(AFTER_DEPS) ## run Linux guests in an unmodified QEMU against the example device
	@tests/qemu/run.sh $(BUILD) || test $$? -eq 77

check-qemu-long: examples | $(AFTER_DEPS) ## run disks in Linux guests for ten minutes each
	@tests/qemu/run.sh --long $(BUILD) || test $$? -eq 77

ifneq ($(wildcard tests/firmware.sh),)
check-firmware: | $(AFTER_DEPS) ## run the codec and the vIOMMU in a freestanding Cortex-M image
	@tests/firmware.sh $(BUILD) || test $$? -eq 77
endif

check-compile: $(BUILD)/config | $(AFTER_DEPS) ## compile the headers with every compiler, standard and option that they support
	@sh tests/compile/run.sh $(BUILD)/compile

$(BUILD)/bench/bench: tests/bench/bench.c $(BUILD)/config
	@mkdir -p $(@D)
	$(CC) $(call COMPILE,-O2) $(LDFLAGS) -o $@ $<

$(BUILD)/bench/bench_iommu: tests/bench/bench_iommu.c $(BUILD)/config
	@mkdir -p $(@D)
	$(CC) $(call COMPILE,-O2) $(LDFLAGS) -o $@ $< tests/impl.c

bench: $(BUILD)/bench/bench ## measure every path of vfu.h beside bare system calls
	@$< $(ROUNDS)

bench-iommu: $(BUILD)/bench/bench_iommu ## measure the vIOMMU beside memcpy
	@$< $(ROUNDS)

# What a program gets in its memory: code, constants and variables, as `size` counts them.
size: $(BUILD)/config ## measure the size of the implementation, and of the codec alone
	@CC='$(CC)' sh tests/bench/size.sh $(BUILD)/bench

$(BUILD)/bench/bench_round_trip: tests/bench/bench_round_trip.c $(BUILD)/config
	@mkdir -p $(@D)
	$(CC) $(call COMPILE,-O2) $(LDFLAGS) -o $@ $<

bench-nvme: $(BUILD)/examples/nvme $(BUILD)/bench/bench_round_trip | $(AFTER_DEPS) ## measure the example disk beside QEMU's own
	@tests/qemu/bench_nvme.sh $(BUILD) $(BENCH_NVME) || test $$? -eq 77

$(BUILD)/vfu.pc: vfu.h FORCE
	@mkdir -p $(@D)
	@version=$$(sed -n 's/^# *define  *VFU_VERSION  *"\([^"]*\)".*/\1/p' vfu.h);                                       \
	    test -n "$$version" || { echo 'vfu.h: no VFU_VERSION' >&2; exit 1; };                                         \
	    printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' '' 'Name: vfu'                                \
	        'Description: vfio-user protocol and user-space IOMMU, two single-header C11 libraries'                   \
	        "Version: $$version" 'Cflags: -I$${includedir}' 'Libs: -pthread' >$@

# The example devices come with the descriptions that the specification's appendix asks for. It names one place for them, and an
# installation below another prefix than the system's keeps to that prefix.
DEVICES       := dma_engine serial nvme
LIBEXEC       ?= $(PREFIX)/libexec/vfu
VFIO_USER_DIR ?= $(if $(filter /usr /usr/local,$(PREFIX)),/usr/share/vfio-user,$(PREFIX)/share/vfio-user)

install: $(BUILD)/vfu.pc $(DEVICES:%=$(BUILD)/examples/%) ## install the headers, the pkg-config file and the example devices below PREFIX
	mkdir -p '$(DESTDIR)$(PREFIX)/include' '$(DESTDIR)$(PREFIX)/share/pkgconfig' '$(DESTDIR)$(LIBEXEC)' '$(DESTDIR)$(VFIO_USER_DIR)'
	cp vfu.h vfu_iommu.h '$(DESTDIR)$(PREFIX)/include/'
	cp $(BUILD)/vfu.pc '$(DESTDIR)$(PREFIX)/share/pkgconfig/'
	cp $(DEVICES:%=$(BUILD)/examples/%) '$(DESTDIR)$(LIBEXEC)/'
	for d in $(DEVICES); do \
	    sed 's|@BINDIR@|$(LIBEXEC)|' examples/$$d.json.in >'$(DESTDIR)$(VFIO_USER_DIR)'/50-vfu-$$d.json || exit 1; done
	cd '$(DESTDIR)$(PREFIX)' && chmod 644 include/vfu.h include/vfu_iommu.h share/pkgconfig/vfu.pc
	chmod 644 $(DEVICES:%='$(DESTDIR)$(VFIO_USER_DIR)/50-vfu-%.json')

uninstall: ## remove what install put there
	cd '$(DESTDIR)$(PREFIX)' && rm -f include/vfu.h include/vfu_iommu.h share/pkgconfig/vfu.pc
	rm -f $(DEVICES:%='$(DESTDIR)$(LIBEXEC)/%') $(DEVICES:%='$(DESTDIR)$(VFIO_USER_DIR)/50-vfu-%.json')

clean: ## remove everything that was built
	rm -rf '$(BUILD)'

-include $(wildcard $(BUILD)/*/*.d $(BUILD)/*/*/*.d)
