# The package. Parsed by `make packages`, never evaluated: see README.md beside this.
{
  lib,
  stdenv,
  gnumake,
  python3,
}:

let
  python = python3.withPackages (
    packages: with packages; [
      dbus-fast
      psutil
      rich
      systemd
    ]
  );
in
stdenv.mkDerivation {
  pname = "qkilld";
  version = "1.0.0";
  src = ../..;

  nativeBuildInputs = [
    gnumake
    python
  ];

  dontBuild = true;

  installPhase = ''
    runHook preInstall
    make install PACKAGE=yes PREFIX=$out PYTHON=${python}/bin/python3 \
      UNITDIR=$out/lib/systemd/system USERUNITDIR=$out/lib/systemd/user \
      CATALOGDIR=$out/lib/systemd/catalog DBUSDATADIR=$out/share \
      POLKITDIR=$out/share/polkit-1/actions ZSHDIR=$out/share/zsh/site-functions
    # Identify byte code by hashes of the sources, because all dates in the store are the same.
    ${python}/bin/python3 -m compileall -q --invalidation-mode unchecked-hash \
      $out/lib/qkilld/python
    runHook postInstall
  '';

  meta = {
    description = "Stops QEMU guests without losing what they wrote";
    license = lib.licenses.lgpl21Plus;
    platforms = lib.platforms.linux;
    mainProgram = "qkillctl";
  };
}
