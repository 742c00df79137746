from captum_intramodal.cli import main

main()
